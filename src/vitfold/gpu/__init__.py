"""What vitfold gives PyTorch on the GPU at hand, measured: `make gpu`, `vitfold bench --gpu-report DIR`."""
