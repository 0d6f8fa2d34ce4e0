//! The methods of gRPC and the paths of HTTP that there are, in one table: what has to be known of a call before anything has
//! read it.

/// Whether the server serves, over HTTP.
pub const HEALTH: &str = "/health";
/// What UniRL may ask to be scored by.
pub const REWARDS: &str = "/rewards";
/// UniRL's scoring.
pub const SCORE: &str = "/score";
/// Flow-Factory's scoring.
pub const COMPUTE: &str = "/compute";

/// The page to look with, and all that it is made of.
pub const PAGE: &str = "/";
/// Stands before what the page is made of.
const PARTS_OF_PAGE: &str = "/page/";
/// Our own form: what is served.
pub const V1_MODELS: &str = "/v1/models";
/// Our own form: scores, and what the models see.
pub const V1_SCORE: &str = "/v1/score";
/// Our own form: why a score is what it is.
pub const V1_EXPLAIN: &str = "/v1/explain";
/// Our own form: what was scored of late.
pub const V1_RECENT: &str = "/v1/recent";
/// What our own form is.
pub const V1_OPENAPI: &str = "/v1/openapi.json";

/// One of them.
#[derive(Debug, PartialEq, Eq)]
pub struct Method {
    path: &'static str,
    /// How metrics and traces name it.
    pub label: &'static str,
    /// Whether callers must show who they are. Health checkers are asked nothing: neither Kubernetes nor most balancers can
    /// show a token, and all that they learn is whether the server serves.
    pub token: bool,
    /// Whether those who administer the server may call too, and are told of all callers.
    pub overseen: bool,
    /// Whether its calls are those of the service that costs something, and their messages are counted.
    pub scoring: bool,
    /// Whether the memory of its calls counts: that of their messages, or of the answer.
    pub counted: bool,
    /// Whether its calls have any number of messages.
    pub streaming: bool,
    /// Whether a call's body is its message, as in HTTP, and has no framing.
    pub http: bool,
}

static METHODS: [Method; 25] = [
    grpc("Score", "/spatialscore.v1.SpatialScoreService/Score").scoring(),
    grpc("ScoreStream", "/spatialscore.v1.SpatialScoreService/ScoreStream").scoring().streaming(),
    grpc("GetModel", "/spatialscore.v1.SpatialScoreService/GetModel").scoring(),
    grpc("ListModels", "/spatialscore.v1.SpatialScoreService/ListModels").scoring(),
    grpc("LoadModel", "/spatialscore.v1.AdminService/LoadModel"),
    grpc("ReplaceModel", "/spatialscore.v1.AdminService/ReplaceModel"),
    grpc("UnloadModel", "/spatialscore.v1.AdminService/UnloadModel"),
    grpc("SleepModel", "/spatialscore.v1.AdminService/SleepModel"),
    grpc("WakeModel", "/spatialscore.v1.AdminService/WakeModel"),
    grpc("DescribeModels", "/spatialscore.v1.AdminService/DescribeModels"),
    grpc("Check", "/grpc.health.v1.Health/Check").without_token(),
    grpc("List", "/grpc.health.v1.Health/List").without_token(),
    grpc("Watch", "/grpc.health.v1.Health/Watch").without_token(),
    grpc("ServerReflectionInfo", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo").streaming(),
    grpc("ServerReflectionInfo", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        .streaming(),
    http(HEALTH).without_token(),
    http(REWARDS),
    http(SCORE).scoring(),
    http(COMPUTE).scoring(),
    http(V1_MODELS).overseen(),
    http(V1_SCORE).scoring(),
    http(V1_EXPLAIN).scoring(),
    http(V1_RECENT).overseen().counted(),
    http(V1_OPENAPI).without_token(),
    http(PAGE).without_token(),
];

/// What a caller makes up is no label, and no way round a token.
static UNKNOWN: Method = grpc("unknown", "");

impl Method {
    /// That of a path.
    pub fn of(path: &str) -> &'static Self {
        let path = if path.starts_with(PARTS_OF_PAGE) { PAGE } else { path };
        METHODS.iter().find(|method| method.path == path).unwrap_or(&UNKNOWN)
    }

    const fn without_token(self) -> Self {
        Self { token: false, ..self }
    }

    const fn scoring(self) -> Self {
        Self { scoring: true, ..self.counted() }
    }

    const fn counted(self) -> Self {
        Self { counted: true, ..self }
    }

    const fn overseen(self) -> Self {
        Self { overseen: true, ..self }
    }

    const fn streaming(self) -> Self {
        Self { streaming: true, ..self }
    }
}

const fn grpc(label: &'static str, path: &'static str) -> Method {
    Method {
        path,
        label,
        token: true,
        overseen: false,
        scoring: false,
        counted: false,
        streaming: false,
        http: false,
    }
}

const fn http(path: &'static str) -> Method {
    Method { http: true, ..grpc(path, path) }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;
    use crate::edge::proto;

    /// Every method of the contracts that the server describes has its row, and streams as it says.
    #[test]
    fn the_table_has_the_methods_that_there_are() {
        let contracts = [
            proto::ALL_DESCRIPTORS,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ];
        let mut found = 0;
        for file in contracts.into_iter().flat_map(|set| FileDescriptorSet::decode(set).unwrap().file) {
            for service in &file.service {
                for described in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), described.name());
                    let method = Method::of(&path);
                    assert_eq!((method.path, method.label), (&*path, described.name()));
                    assert_eq!(method.streaming, described.client_streaming(), "{path}");
                    assert_eq!(method.token, file.package() != "grpc.health.v1", "{path}");
                    assert_eq!(method.scoring, service.name() == "SpatialScoreService", "{path}");
                    found += 1;
                }
            }
        }
        assert_eq!(found, METHODS.iter().filter(|method| !method.http).count());
    }

    #[test]
    fn what_a_caller_makes_up_is_unknown_and_needs_a_token() {
        for path in
            ["", "//", "/page", "/v1/", "/x/score", "/x/Score", "/score/", "/grpc.health.v1.Health/Checks"]
        {
            assert_eq!(Method::of(path), &UNKNOWN, "{path:?}");
        }
    }
}
