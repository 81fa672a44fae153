"""The commands of Diffusion Transformers."""
