"""Generated messages and service stubs of the package hmm.v1."""
