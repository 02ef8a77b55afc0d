"""The planner's side, without privilege: the plan, its hand-over to the senders, and the facts that it is made of."""
