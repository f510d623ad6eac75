"""Conditioner networks of the coupling layers. The last layer starts at zero: identity coupling."""

from torch import nn

__all__ = ["conv_net", "mlp"]


def _zeroed(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conv_net(in_channels, hidden_channels, out_channels, dropout=0.0):
    """Glow's conditioner: 3x3, 1x1, 3x3 convolutions with ReLU between them.

    Parameters
    ----------
    in_channels, hidden_channels, out_channels : int
    dropout : float in [0, 1), default=0
        Dropout of whole hidden channels while training.

    Returns
    -------
    net : torch.nn.Sequential
        Maps ``(n, in_channels, H, W)`` to ``(n, out_channels, H, W)``; zero at initialisation.
    """
    layers = [
        nn.Conv2d(in_channels, hidden_channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden_channels, hidden_channels, 1),
        nn.ReLU(),
        _zeroed(nn.Conv2d(hidden_channels, out_channels, 3, padding=1)),
    ]
    if dropout:
        layers.insert(4, nn.Dropout2d(dropout))
    return nn.Sequential(*layers)


def mlp(in_features, hidden_features, out_features, dropout=0.0):
    """Two hidden ReLU layers.

    Parameters
    ----------
    in_features, hidden_features, out_features : int
    dropout : float in [0, 1), default=0
        Dropout of hidden units while training.

    Returns
    -------
    net : torch.nn.Sequential
        Maps ``(n, in_features)`` to ``(n, out_features)``; zero at initialisation.
    """
    layers = [
        nn.Linear(in_features, hidden_features),
        nn.ReLU(),
        nn.Linear(hidden_features, hidden_features),
        nn.ReLU(),
        _zeroed(nn.Linear(hidden_features, out_features)),
    ]
    if dropout:
        layers.insert(4, nn.Dropout(dropout))
    return nn.Sequential(*layers)
