"""The plugin library: every op's kernels compiled ahead of time, and the C++ that launches them."""
