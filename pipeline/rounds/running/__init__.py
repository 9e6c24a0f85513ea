"""How stages run over the shards of a round: in threads of this process, or in tasks of Ray Data on all machines."""
