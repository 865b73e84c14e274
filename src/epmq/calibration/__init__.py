"""Block by block: collect moments, aim at the experts, solve."""
