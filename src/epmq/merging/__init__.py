"""Base and experts as readers of tensors, and the merge of them."""
