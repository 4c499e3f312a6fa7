# Both base images can be replaced, by mirrors or by images that are already there.
ARG BUILD_IMAGE=golang:1.27-bookworm
ARG BASE_IMAGE=scratch

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY *.go addresses.txt status.html ./
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=${VERSION}" -o /sluice .

FROM ${BASE_IMAGE}
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /sluice /sluice
# Inside the container's own network everything may be listened on; who may connect is SLUICE_ALLOW_CLIENTS.
ENV SLUICE_LISTEN=:3128
# Go's HTTP/2 server offers extended CONNECT, for WebSockets and UDP tunnels, when asked like this alone.
ENV GODEBUG=http2xconnect=1
USER 65534:65534
EXPOSE 3128 3128/udp
HEALTHCHECK --interval=5s --timeout=4s --start-period=5s CMD ["/sluice", "health"]
ENTRYPOINT ["/sluice"]
