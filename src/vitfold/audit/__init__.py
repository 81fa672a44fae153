"""What NVIDIA's compiler makes of a graph, found out ahead of time on any machine, and its modelled cost.

`audit.audit_graph` is the entry; serving imports none of it.
"""
