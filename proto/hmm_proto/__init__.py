"""The wire format: messages and services of hmm.v1, and their conversion to and from the core."""
