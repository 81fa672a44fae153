"""What NVIDIA's compiler makes of a graph, found out ahead of time on any machine, and its modelled cost."""

from vitfold.audit.audit import Audit, audit_graph
from vitfold.audit.findings import Finding, check_attention
from vitfold.audit.kernels import Kernel

__all__ = ["Audit", "Finding", "Kernel", "audit_graph", "check_attention"]
