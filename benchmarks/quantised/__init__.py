"""A real model whose linear layers hold few bits a weight: what runs, what it takes, what drafts are worth there."""
