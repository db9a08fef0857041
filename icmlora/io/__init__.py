"""Files and devices: safetensors, strict JSON, atomic output, GPUs, memory and threads."""
