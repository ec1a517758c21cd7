"""Small C kernels: compiled once for this processor, loaded with ctypes, and never needed for a right result."""
