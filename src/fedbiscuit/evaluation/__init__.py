"""Evaluation: how well selectors agree with held-out people, and which of two policies is preferred."""
