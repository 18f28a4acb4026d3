"""How much quality each way of making routed experts smaller costs."""
