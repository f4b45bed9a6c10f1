"""``l4convert::LongContextAttention``: Llama 4's attention of one layer, KV cache included."""
