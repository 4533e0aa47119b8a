"""What is possible at best: with these drafts, on this machine, on another."""
