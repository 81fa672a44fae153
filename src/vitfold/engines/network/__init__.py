"""Graphs of bundles as torch modules, and the engines that run them."""

from __future__ import annotations

from vitfold.engines.network.translation import Network, read_network, torch_module

__all__ = ["Network", "read_network", "torch_module"]
