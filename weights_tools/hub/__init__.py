"""An adapter on the hub: what is sent, its card, and the verbs ``push`` and ``pull``."""
