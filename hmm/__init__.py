"""Linux HMM as a pure library: address spaces, mirrors, range faults and migration."""
