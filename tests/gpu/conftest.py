import os

# cuBLAS reads it as CUDA starts: with these workspaces its results are the same on every run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
