"""From the web to training text: one module a stage, each a datatrove step that can be used alone.

The stages and their order are CCNet's (arXiv 1911.00359) and LLaMA's (arXiv 2302.13971, section 2.1);
`training.prepare_text` puts them together.
"""
