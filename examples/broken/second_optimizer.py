"""The mistake: of two optimizers one is tracked; the other one's momentum starts at zero again.

Mended: `ckptd.attach(..., critic_optimizer=critic_optimizer)`.
"""

import torch
from torch import nn

import ckptd


def main():
    torch.manual_seed(1)
    actor, critic = nn.Linear(4, 4), nn.Linear(4, 1)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=0.01)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=0.02)
    job = ckptd.attach(actor=actor, critic=critic, actor_optimizer=actor_optimizer)
    for _ in job.loop(range(20)):
        x = torch.randn(16, 4)
        critic_loss = (critic(actor(x).detach()) - x.sum(1, keepdim=True)).pow(2).mean()
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        actor_loss = -critic(actor(x)).mean()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()


if __name__ == "__main__":
    main()
