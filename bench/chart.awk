# Draws bench/run's medians ("NAME KEY VALUE" lines) as an SVG of horizontal bars, one panel per figure, the best bar first.
# awk -f chart.awk -v names="Sluice …" -v note=TEXT medians > results.svg
#
# The background is drawn, not left to the page: a page's theme and the reader's prefers-color-scheme need not agree.

function panel(key, unit, digits, title,   i, j, n, t, list, max, w, y0) {
	for (i = 1; i <= count; i++) if ((name[i], key) in v) list[++n] = name[i]
	if (!n) return
	for (i = 2; i <= n; i++) for (j = i; j > 1 && v[list[j], key] < v[list[j - 1], key]; j--) { t = list[j]; list[j] = list[j - 1]; list[j - 1] = t }
	max = v[list[n], key]
	top += 34
	body = body sprintf("<text class=\"title\" x=\"24\" y=\"%d\">%s</text>\n", top, title)
	top += 12
	for (i = 1; i <= n; i++) {
		w = max > 0 ? v[list[i], key] / max * 470 : 0
		if (w < 2) w = 2 # a bar that can be seen
		y0 = top + (i - 1) * 26
		body = body sprintf("<text class=\"name%s\" x=\"144\" y=\"%d\">%s</text>", list[i] == "Sluice" ? " own" : "", y0 + 15, list[i] == "nginx" ? "nginx (reverse)" : list[i])
		body = body sprintf("<rect class=\"%s\" x=\"154\" y=\"%d\" width=\"%.1f\" height=\"20\" rx=\"2\"/>", list[i] == "Sluice" ? "ours" : "peer", y0, w)
		body = body sprintf("<text class=\"value%s\" x=\"%.1f\" y=\"%d\">%.*f</text>\n", list[i] == "Sluice" ? " own" : "", 154 + w + 8, y0 + 15, digits, v[list[i], key] / unit)
	}
	top += n * 26
}

{ v[$1, $2] = $3 + 0 }

END {
	count = split(names, name, " ")
	top = 10
	panel("cpu", 1, 1, "CPU per request, µs")
	panel("p99", 1000, 2, "99th percentile of latency at 100 clients, ms")
	panel("tunnelcpu", 1, 0, "CPU per tunnel (CONNECT, one GET, close), µs")
	top += 34
	printf "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"720\" height=\"%d\" viewBox=\"0 0 720 %d\" role=\"img\" aria-label=\"Sluice beside other proxies: CPU and latency, shorter is better\">\n", top + 20, top + 20
	print "<style>"
	print "  text { font: 14px system-ui, -apple-system, \"Segoe UI\", \"Helvetica Neue\", Arial, sans-serif; fill: #1f2328 }"
	print "  .title { font-weight: 600 } .name { text-anchor: end } .own { font-weight: 600 } .note { font-size: 12px; fill: #59636e }"
	print "  .back { fill: #ffffff } .ours { fill: #0a7ea4 } .peer { fill: #b6bec8 }"
	print "  @media (prefers-color-scheme: dark) {"
	print "    text { fill: #e6edf3 } .note { fill: #9198a1 }"
	print "    .back { fill: #0d1117 } .ours { fill: #39b8e0 } .peer { fill: #57606a }"
	print "  }"
	print "</style>"
	printf "<rect class=\"back\" width=\"720\" height=\"%d\" rx=\"6\"/>\n", top + 20
	printf "%s", body
	printf "<text class=\"note\" x=\"24\" y=\"%d\">Shorter is better. %s.</text>\n</svg>\n", top, note
}
