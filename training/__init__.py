"""Training scripts. What libraries say of each other, and a user can do nothing about, is kept from their output."""

import logging
import warnings

# bitsandbytes misses an optional kernel whenever PEFT imports it; PEFT and TRL ask transformers by an old name.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
