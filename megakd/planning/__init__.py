"""What a recipe will need and take on a cluster, from arithmetic: memory, floating-point operations, traffic, time.

It starts nothing and builds no model: a plan for thousands of GPUs is made on a laptop.
"""
