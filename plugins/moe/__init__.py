"""``l4convert::MoE``: Llama 4's routed experts of one layer."""
