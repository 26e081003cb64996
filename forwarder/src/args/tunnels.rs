//! The settings of tunnels, from the flags and the config files together.

use std::collections::HashMap;

use super::UsageError;
use crate::{
    config_file::ConfigFile,
    settings::{Layer, LayerError, Settings},
};

/// The settings of a tunnel that has no table in the file.
pub(super) fn settings_of_one(
    layer: &Layer,
    file: &ConfigFile,
    name: &str,
) -> Result<Settings, UsageError> {
    Ok(with_file(layer, &Layer::default(), file)?.settings(name)?)
}

pub(super) fn start(
    flags: &Layer,
    all: bool,
    names: Vec<String>,
    file: &ConfigFile,
) -> Result<Vec<Settings>, UsageError> {
    let known = || {
        let names: Vec<&str> = file.tunnels.keys().map(String::as_str).collect();
        names.join(", ")
    };
    if file.tunnels.is_empty() {
        return Err(UsageError::NoTunnels);
    }
    let names = if all {
        file.tunnels.keys().cloned().collect()
    } else {
        names
    };
    if names.is_empty() {
        return Err(UsageError::NoNames(known()));
    }
    if let Some(twice) = first_duplicate(&names) {
        return Err(UsageError::NamedTwice(twice.clone()));
    }
    if names.len() > 1
        && (flags.tunnel_id().is_some() || flags.target().is_some() || flags.url.is_some())
    {
        return Err(UsageError::ForOneTunnel);
    }
    // A tunnel id at the top is the one of `ttf http`: two tunnels cannot share it.
    let mut file = file.clone();
    file.top.tunnel_id = None;
    let mut tunnels = Vec::new();
    for name in names {
        let tunnel = file
            .tunnels
            .get(&name)
            .ok_or_else(|| UsageError::UnknownName {
                known: known(),
                name: name.clone(),
            })?;
        tunnels.push(with_file(flags, tunnel, &file)?.settings(&name)?);
    }
    check_tunnel_ids(&tunnels)?;
    Ok(tunnels)
}

/// Every tunnel of a file, checked.
pub(super) fn every_tunnel(flags: &Layer, file: &ConfigFile) -> Result<Vec<Settings>, UsageError> {
    if file.tunnels.is_empty() {
        return Ok(Vec::new());
    }
    let flags = Layer {
        tunnel_id: None,
        target: None,
        url: None,
        ..flags.clone()
    };
    start(&flags, true, Vec::new(), file)
}

/// The tunnels that the files have for `ttf start`, or the one for `ttf http`. A file may leave its endpoint to others.
pub(super) fn checked_tunnels(
    flags: &Layer,
    file: &ConfigFile,
) -> Result<Vec<Settings>, UsageError> {
    if !file.tunnels.is_empty() {
        return every_tunnel(flags, file);
    }
    match settings_of_one(flags, file, "http") {
        Ok(settings) => Ok(vec![settings]),
        Err(UsageError::Settings(LayerError::NoEndpoint)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// What the flags leave open, from a tunnel's table and what it takes from the rest of the file.
pub(super) fn with_file(
    flags: &Layer,
    tunnel: &Layer,
    file: &ConfigFile,
) -> Result<Layer, UsageError> {
    let service = flags.service.as_deref().or(tunnel.service.as_deref());
    let defaults = file.defaults(service).ok_or_else(|| {
        let name = service.or(file.top.service.as_deref());
        unknown_service(name.unwrap_or_default(), file)
    })?;
    let layer = flags.with_credentials_for_endpoint(&tunnel.or(&defaults));
    // An endpoint that is given without a token has the one that is stored for it.
    let token = layer.token.clone().or_else(|| {
        let endpoint = layer.endpoint.as_ref()?;
        let mut stored = file.services.values().chain([&file.top]);
        stored
            .find(|stored| stored.endpoint.as_ref() == Some(endpoint))?
            .token
            .clone()
    });
    Ok(Layer { token, ..layer })
}

pub(super) fn unknown_service(name: &str, file: &ConfigFile) -> UsageError {
    let known: Vec<&str> = file.services.keys().map(String::as_str).collect();
    UsageError::UnknownService {
        name: name.to_owned(),
        known: if known.is_empty() {
            format!("`ttf login ENDPOINT --service {name}` stores one")
        } else {
            format!("they have: {}", known.join(", "))
        },
    }
}

fn first_duplicate(names: &[String]) -> Option<&String> {
    let is_duplicate = |(at, name): &(usize, &String)| names[..*at].contains(name);
    names
        .iter()
        .enumerate()
        .find(is_duplicate)
        .map(|(_, name)| name)
}

fn check_tunnel_ids(tunnels: &[Settings]) -> Result<(), UsageError> {
    let mut seen = HashMap::new();
    for tunnel in tunnels {
        let Some(tunnel_id) = &tunnel.tunnel_id else {
            continue;
        };
        let key = (tunnel.endpoint.to_string(), tunnel_id);
        if let Some(first) = seen.insert(key, &tunnel.name) {
            return Err(UsageError::SameTunnelId {
                first: first.clone(),
                second: tunnel.name.clone(),
                tunnel_id: tunnel_id.clone(),
            });
        }
    }
    Ok(())
}
