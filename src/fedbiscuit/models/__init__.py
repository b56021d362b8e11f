"""Models: the frozen LM, its adapters, and all that is computed with them. Only this room touches transformers and peft."""

import logging

logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # PEFT loads it where it is there; it warns of kernels we do not use
