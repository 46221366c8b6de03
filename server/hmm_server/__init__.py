"""The daemon: serves the core over gRPC."""
