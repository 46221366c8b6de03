"""The services of hmm.v1, one module for each .proto file, same stem.

**Absent**: `try`: errors pass to the interceptor, which knows what becomes of them.
"""
