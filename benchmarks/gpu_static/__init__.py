"""The Triton engine without a GPU: its machine code is compared with budgets, its time is modelled."""
