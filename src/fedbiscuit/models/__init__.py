"""Models: the frozen LM, its adapters, and all that is computed with them. Only this room touches transformers and peft."""
