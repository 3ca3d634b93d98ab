"""What keeps a deployment healthy, apart from the request path."""
