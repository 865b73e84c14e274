"""The demonstration: real pretrained weights and real tasks that come through pip alone."""
