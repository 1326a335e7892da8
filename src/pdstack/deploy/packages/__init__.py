"""Which packages a host gets, by distribution: computed here, installed by the roles."""
