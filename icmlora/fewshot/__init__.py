"""Make an adapter for a task that was never ingested, from a few of its samples.

    samples ──base + start──▶ evidence (gradients, mean squares) ──learned step──▶ start + dW ──▶ adapter

`start` is what the fleet has in common, its mean dW; how far each module steps is learned from the fleet's tasks. This
is model-agnostic meta-learning (Finn et al., arXiv 1703.03400) with learned rates (Meta-SGD, arXiv 1707.09835).
"""
