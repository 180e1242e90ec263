"""What our plugins in vLLM and in SGLang share. Imports the standard library and torch only."""
