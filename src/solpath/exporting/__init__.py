"""Write models in the formats of other runtimes, each run beside the original before it is done."""
