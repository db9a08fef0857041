"""Names of the files in an adapter's folder."""

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
SAMPLES_NAME = "samples.jsonl"
EVAL_NAME = "eval.jsonl"
