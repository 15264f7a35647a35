"""The cluster on a virtual clock: the gateway's dispatcher, policy and view, the workers' roles,
schedulers and block pools are the ones that serve; steps, links and messages take the time that a
profile says. Imports neither torch nor ray, and runs no event loop."""
