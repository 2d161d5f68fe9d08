"""What is done with manifests beside reading them: checking, cutting and counting."""
