"""Shows what happens: a live page, and metrics for Prometheus. It can be left out: it only reads.

It subscribes to status, health, registry and exporters, once for all pages, and listens for HTTP. It needs no
privilege. An *observer* makes of these a *picture* each second, the *history* keeps 15 minutes of it, and each open
page gets it as an *event*. An admin's changes go to the gateway, with the admin's token. Only this service needs a web
server: without the extra `console` it stays up and says so.
"""
