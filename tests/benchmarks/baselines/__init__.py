"""The methods that icm is compared with; each writes real bytes and reads adapters back from them."""
