"""Steps planned on the host, one forward after another."""
