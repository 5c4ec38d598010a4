"""What a network is made of: groups of coupled components, segments to carry activations through, surgery, counting."""
