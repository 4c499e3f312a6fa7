module sluice

go 1.26.0

toolchain go1.27.3

require (
	github.com/caarlos0/env/v11 v11.4.2
	github.com/lmittmann/tint v1.2.1
	golang.org/x/crypto v0.59.0
	golang.org/x/net v0.62.0
	golang.org/x/sys v0.50.0
)

require github.com/dustin/go-humanize v1.1.0

require github.com/gaissmai/bart v0.30.0

require (
	github.com/hashicorp/golang-lru/v2 v2.0.7
	golang.org/x/sync v0.25.0
	golang.org/x/time v0.16.0
)

require github.com/agnivade/levenshtein v1.2.2
