"""What watches a deployment: readings of the machine, the metric history, alerts and who is told of them."""
