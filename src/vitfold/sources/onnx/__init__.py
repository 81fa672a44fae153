"""Somebody's ONNX file as a program: read, brought into a normal form, lifted to the operations of `Ops`."""
