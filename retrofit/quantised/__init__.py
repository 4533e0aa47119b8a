"""Bases whose linear layers hold few bits a weight: loaded so, or stored so."""
