"""Files: safetensors, strict JSON, output that appears as a whole, devices."""
