"""What driving engines with servers of their own has in common: vLLM and SGLang."""
